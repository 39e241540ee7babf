"""Tensors with independently known answers, and the script that makes them."""
