"""What samples are worth: features and logits in the order of the images, and the figures made from them."""
