"""The pool: Ray actors that turn videos into published adapters, and the threads that keep them busy."""
