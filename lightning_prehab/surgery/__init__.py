"""The change itself: ``swap`` alone changes a model, ``optimizers`` alone an optimizer."""
