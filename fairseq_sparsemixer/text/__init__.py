"""Raw lines to the pieces that a model reads, and back."""
