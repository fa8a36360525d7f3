"""What plans cost, on text that was held out."""
