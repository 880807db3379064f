"""Pretraining: the DeepSpeed engine behind one seam, the loop, and what happens around a step."""
