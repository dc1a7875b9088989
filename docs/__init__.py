"""What the README shows, and the program that makes it."""
