"""Learns on the device: keeps what people said of answers, and turns it into lessons."""
