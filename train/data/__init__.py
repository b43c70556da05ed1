"""Which training example has which number, and where its picture and caption come from."""
