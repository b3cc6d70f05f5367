"""What a diffusers folder of class-conditional students brings along: each module is copied there as it is."""
