"""What a full-size run needs and the paper does not explain: files, weights, checkpoints, flags, pictures, the demo."""
