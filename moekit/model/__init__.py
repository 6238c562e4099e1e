"""The T5 encoder-decoder with dense and sparse feed-forward layers."""
