"""The engines that train on several devices, and what each does with the base, the adapter and the optimizer."""
