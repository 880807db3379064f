"""Looking at runs and models: loss curves, summaries, evaluation tasks."""
