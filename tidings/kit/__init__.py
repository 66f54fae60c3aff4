"""What every process of Tidings needs, and all that a component author uses.

- `service`, `runner`          what a service is, and how a process of them starts and stops
- `options`, `logging`, `metrics`, `admin`
- `pki`, `identity`, `access`  who may talk on the cluster port
- `grpc_server`, `channel`, `inprocess`, `link`, `rpc_errors`
- `membership`                 a node's side of the cluster
- `db`, `migrations`           the shared database
- `module`                     the router's modules
- `component`                  components: services with a domain of their own
"""
