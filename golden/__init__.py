"""Test tensors with independently computed answers, and the script that generates them."""
