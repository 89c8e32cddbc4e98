"""What all ops stand on; it knows none of them."""
