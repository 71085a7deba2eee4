def vision_config(*a): raise NotImplementedError
