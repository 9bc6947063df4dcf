"""The `wan-data` commands; what they do is in `wan_dist.data`."""
