"""A full-size run needs these files, and the paper does not explain them."""
