"""Find out how few experts a pretrained model can do with, and what that costs in quality."""
