"""What lies between kernelpress and the software below it: all names that torch and Triton keep to themselves."""
