"""From a batch of episodes to the gradient of the meta-parameters, within the memory there is."""
