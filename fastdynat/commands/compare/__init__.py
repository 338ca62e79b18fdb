"""`fastdynat compare`: several training methods on the same data, model, budget and seeds."""
