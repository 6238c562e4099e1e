import os
os.environ["JAX_NUM_CPU_DEVICES"]="8"; os.environ["JAX_PLATFORMS"]="cpu"
from jaxtyping import install_import_hook
install_import_hook("moekit","beartype.beartype")
import sys
if os.environ.get("STUB"): 
    sys.path.insert(0,"/tmp"); import m
