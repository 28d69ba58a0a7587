"""What a request to each task does."""
