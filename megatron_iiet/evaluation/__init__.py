"""Looking at runs and models: sampled text, loss curves, summaries."""
