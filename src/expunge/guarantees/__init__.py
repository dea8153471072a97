"""What can be proved: certified removal for linear heads, accounting of noisy descent, explanations that stay valid."""
