"""What `bitnet_ops.generate` is made of: decoding loop, settings, sampling, drafts, text in and out."""
