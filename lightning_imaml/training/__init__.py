"""What manual optimization leaves to the module: outer step, resume, counting meta-steps, ranks."""
