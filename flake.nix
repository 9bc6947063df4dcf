{
  description = "Development shells for wan_dist: CPU (default), CUDA and ROCm";

  # The revision in the URL is the lock: nothing moves until this line changes.
  inputs.nixpkgs.url = "github:NixOS/nixpkgs/998884a94e06fb457a860c9e9de4cf6356fc12a5";

  outputs =
    { self, nixpkgs }:
    let
      inherit (nixpkgs) lib;
      systems = [ "x86_64-linux" ];

      pkgsFor =
        system: config:
        import nixpkgs {
          inherit system;
          config = {
            allowUnfree = true;
          }
          // config;
        };

      # nixpkgs brings the interpreter, compilers and system libraries. Python packages come from pip under
      # constraints.txt, because this revision's deepspeed (0.19.6) is older than the release that wan_dist needs.
      shell =
        {
          pkgs,
          name,
          torchIndex ? null,
          packages ? [ ],
          libraries ? [ ],
          hook ? "",
        }:
        pkgs.mkShell {
          name = "wan-dist-${name}";
          packages = [
            pkgs.python312
            pkgs.gnumake
            pkgs.git
            pkgs.gcc
            pkgs.ninja
            pkgs.ffmpeg-headless
          ]
          ++ packages;
          shellHook = ''
            # Wheels are built for the usual Linux layout and look for these outside the store.
            export LD_LIBRARY_PATH="${
              lib.makeLibraryPath (
                [
                  pkgs.stdenv.cc.cc.lib
                  pkgs.zlib
                ]
                ++ libraries
              )
            }''${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
            # DeepSpeed compiles its CPU operators with -march=native, which the compiler wrapper drops by default.
            export NIX_ENFORCE_NO_NATIVE=0
          ''
          + lib.optionalString (torchIndex != null) ''
            export PIP_EXTRA_INDEX_URL="https://download.pytorch.org/whl/${torchIndex}"
          ''
          + hook
          + ''
            echo "wan_dist ${name} shell: make venv-dev && source .venv/bin/activate"
          '';
        };

      shellsFor =
        system:
        let
          cpu = pkgsFor system { };
          cuda = pkgsFor system { cudaSupport = true; };
          rocm = pkgsFor system { rocmSupport = true; };
        in
        {
          # A local version such as 2.13.0+cpu counts as newer than 2.13.0, so pip takes it and not the CUDA build.
          default = shell {
            pkgs = cpu;
            name = "cpu";
            torchIndex = "cpu";
          };

          # PyPI's own torch for Linux is the CUDA build. nvcc compiles DeepSpeed's operators; its major version has to
          # be that of torch.version.cuda.
          cuda = shell {
            pkgs = cuda;
            name = "cuda";
            packages = [ cuda.cudaPackages.cudatoolkit ];
            hook = ''
              export CUDA_HOME="${cuda.cudaPackages.cudatoolkit}"
              export LD_LIBRARY_PATH="/run/opengl-driver/lib:$LD_LIBRARY_PATH"
            '';
          };

          # The ROCm wheels bring the runtime; the tools here name the card and compile operators.
          rocm = shell {
            pkgs = rocm;
            name = "rocm";
            torchIndex = "rocm7.2";
            packages = [
              rocm.rocmPackages.rocminfo
              rocm.rocmPackages.rocm-smi
              rocm.rocmPackages.hipcc
              rocm.rocmPackages.clr
            ];
            libraries = [
              rocm.zstd
              rocm.libdrm
              rocm.numactl
            ];
            hook = ''
              export ROCM_HOME="${rocm.rocmPackages.clr}"
            '';
          };
        };
    in
    {
      devShells = lib.genAttrs systems shellsFor;
      formatter = lib.genAttrs systems (system: (pkgsFor system { }).nixfmt-rfc-style);
    };
}
