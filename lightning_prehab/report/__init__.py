"""What happened to each layer: numbers, figures, pages, latencies."""
