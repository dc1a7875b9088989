"""What the bytes of a Baileys auth state mean: pure functions, no input or output."""
