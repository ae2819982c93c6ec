"""`gatelet train sae`: a sparse autoencoder of a model's residual stream, and a page that shows its latents."""
