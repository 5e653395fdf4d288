"""TensorRT: engines built on the machine where they run, kept in the device cache, and run there."""
