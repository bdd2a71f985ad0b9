"""Other libraries: models of transformers, adapters of peft, programs of torch.export."""
