"""What the stored rows say: pure functions on rows, without torch, a GPU or a clock. Same rows in, same
numbers out."""
