{
  outputs =
    { self }:
    {
      lib = import ./lib.nix;
    };
}
