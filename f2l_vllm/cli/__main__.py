from f2l_vllm.cli.main import main

if __name__ == "__main__":
    main()
