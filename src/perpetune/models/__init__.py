"""Pre-trained models seen as one thing: rows in, features or answers out."""
