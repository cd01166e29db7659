"""What each command does: a request in, an artifact and its manifest out."""
