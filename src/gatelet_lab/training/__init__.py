"""Training: one loop (fit), what it trains (paper, vae, and sae beside), recipes, and jobs side by side."""
