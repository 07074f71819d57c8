"""From a wish (the recipe) to a rank for each layer (the plan); nothing is changed."""
