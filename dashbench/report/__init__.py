"""What people are shown: tables, figures and one page, drawn from stored rows alone. Same rows in, same bytes
out."""
