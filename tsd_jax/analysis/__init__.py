"""Analysis: arrays from what runs leave behind; plots apart from them."""
