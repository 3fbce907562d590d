"""Networks: the U-Nets of the formats, and what freezes and stores a network."""
