"""A Flower app: federated hyper-representation with bilevel."""
