"""What the fuzz tests draw from: networks, batches that fit them, and everything that can be wrong with either."""
