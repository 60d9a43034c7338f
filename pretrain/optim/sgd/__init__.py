"""SGD with momentum, also Nesterov's."""
