"""What the experts of one MoE layer are seen doing, and what their weights say."""
