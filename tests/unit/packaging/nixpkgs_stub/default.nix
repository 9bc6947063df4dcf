# Stand-in for nixpkgs: exactly the attributes that flake.nix may name, so that a misspelt one fails.
{ system, config }:
let
  fake =
    name:
    derivation {
      inherit name system;
      builder = "/bin/sh";
      args = [
        "-c"
        "echo stub > $out"
      ];
    };
  set =
    names:
    builtins.listToAttrs (
      map (name: {
        inherit name;
        value = fake name;
      }) names
    );
in
assert !((config.cudaSupport or false) && (config.rocmSupport or false));
set [
  "ffmpeg-headless"
  "gcc"
  "git"
  "gnumake"
  "libdrm"
  "ninja"
  "nixfmt-rfc-style"
  "numactl"
  "python312"
  "zlib"
  "zstd"
]
// {
  stdenv.cc.cc.lib = fake "gcc-lib";
  cudaPackages = set [ "cudatoolkit" ];
  rocmPackages = set [
    "clr"
    "hipcc"
    "rocm-smi"
    "rocminfo"
  ];
  mkShell =
    {
      name,
      packages,
      shellHook,
    }:
    derivation {
      inherit name system packages shellHook;
      builder = "/bin/sh";
      args = [
        "-c"
        "echo stub > $out"
      ];
    }
    // {
      inherit shellHook;
    };
}
