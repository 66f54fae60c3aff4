"""The options that every installation has. Services and modules declare theirs beside these."""

from __future__ import annotations

from tidings.kit.option_types import Option
from tidings.kit.option_types import OptionType as T

STRATEGIES = {
    # Tigase's names for what is the same here.
    "tigase.cluster.strategy.OnlineUsersCachingStrategy": "online-users",
    "tigase.server.cluster.strategy.OnlineUsersCachingStrategy": "online-users",
    "tigase.cluster.strategy.DefaultClusteringStrategy": "broadcast",
    "tigase.server.cluster.strategy.DefaultClusteringStrategy": "broadcast",
    "tigase.cluster.strategy.SMNonCachingAllNodes": "broadcast",
    "tigase.server.cluster.strategy.SMNonCachingAllNodes": "broadcast",
}
COMPONENT_CLASSES = {
    "tigase.pubsub.PubSubComponent": "pubsub",
    "tigase.pubsub.cluster.PubSubComponentClustered": "pubsub",
}

OPTIONS: tuple[Option, ...] = (
    Option("config", T.LIST, "", "Option files; later ones win. Default: /etc/tidings/init.properties, then ./init.properties."),
    # --- what is served ---
    Option("virt-hosts", T.HOSTS, "localhost", "The virtual hosts: domains whose users log in here.", example="example.org,example.net"),
    Option("admins", T.LIST, "", "Accounts that administer the server.", per_host=True, example="admin@example.org"),
    Option("registration", T.BOOL, "false", "Whether clients may make accounts (XEP-0077).", per_host=True),
    Option("data-dir", T.PATH, "data", "The folder for the secret, certificates and the embedded database."),
    Option("bind-address", T.LIST, "", "Addresses to listen on, for clients and, when given, for the cluster port. Default: all.", example="192.0.2.10,2001:db8::10"),
    Option("c2s-ports", T.PORTS, "5222", "Ports for clients, with STARTTLS."),
    Option("c2s-tls-ports", T.PORTS, "5223", "Ports for clients, with TLS from the first byte (XEP-0368)."),
    Option("c2s-reuse-port", T.BOOL, "false", "Whether connectors of this machine share the client ports; --processes sets it."),
    Option("http-ports", T.PORTS, "5280", "Ports for WebSocket and BOSH, kept for a later release."),
    Option("http-tls-ports", T.PORTS, "5281", "The same with TLS, kept for a later release."),
    Option("admin-port", T.PORT, "5080", "The port of /metrics, /healthz and /readyz; 0 switches it off."),
    Option("admin-bind-address", T.TEXT, "", "Where the admin port listens. Default: --bind-address if that is a loopback address, else 127.0.0.1."),
    Option("tls-cert-file", T.PATH, "", "The certificate (PEM, with its chain) that clients are shown.", per_host=True),
    Option("tls-key-file", T.PATH, "", "Its private key (PEM).", per_host=True),
    Option("certs-dir", T.PATH, "", "A folder with HOST.crt and HOST.key, or HOST/fullchain.pem and HOST/privkey.pem."),
    Option("c2s-allow-plaintext", T.BOOL, "false", "Let clients authenticate without TLS. For development only."),
    Option("scram-iterations", T.COUNT, "10000", "PBKDF2 iterations for new passwords; more costs an attacker and every log-in.", per_host=True, at_least=4096),
    # --- database ---
    Option("user-db", T.CHOICE, "sqlite", "The kind of database.", choices=("sqlite", "mysql")),
    Option("user-db-uri", T.SECRET, "", "Where it is. Default: an SQLite file in --data-dir.", example="jdbc:mysql://db.example.org:3306/tidings?user=tidings&password=…"),
    # --- cluster ---
    Option("cluster-mode", T.BOOL, "false", "Whether this node shares its users with others."),
    Option("cluster-hostname", T.TEXT, "", "This node's name. Default: the machine's full name.", example="n1.example.org"),
    Option("cluster-address", T.TEXT, "", "The address that peers dial. Default: --bind-address if one is given, else --cluster-secondary, else the name."),
    Option("cluster-secondary", T.TEXT, "", "A second name of this node."),
    Option("cluster-port", T.PORT, "5777", "The cluster port: gRPC between services, always mutual TLS."),
    Option("cluster-secret", T.SECRET, "", "A secret of at least 20 characters whose knowledge makes a process a member of the cluster."),
    Option("cluster-host", T.TEXT, "", "The name of this machine, equal for all nodes that fall with it. Default: the kernel's boot id."),
    Option("cluster-lease", T.SECONDS, "5s", "How long a node's beat may stand still before it counts as failed.", at_least=3),
    Option("cluster-tls-ca-file", T.PATH, "", "A certificate authority whose leaves are accepted on the cluster port."),
    Option("cluster-tls-cert-file", T.PATH, "", "The certificate to show on the cluster port."),
    Option("cluster-tls-key-file", T.PATH, "", "Its private key."),
    Option("registry", T.LIST, "", "Registries to join through, for nodes that run none.", example="127.0.0.11:5777"),
    Option("sm-cluster-strategy-class", T.STRATEGY, "home", "The strategy by which routers share users."),
    Option("in-process", T.BOOL, "true", "Services of one process talk directly; false makes them dial the cluster port."),
    Option("comp-name-N", T.TEXT, "", "The name of the component switched on by --comp-class-N.", pattern=True),
    Option("comp-class-N", T.COMPONENT, "", "A component to switch on.", pattern=True, example="tigase.pubsub.cluster.PubSubComponentClustered"),
    Option("component-allow", T.LIST, "", "What the component NAME may register: domains, name.{vhost}, account:NAMESPACE, feed:presence, feed:session-end, *.", named=True, example="weather.{vhost}"),
    # --- sessions ---
    Option("session-copies", T.COUNT, "0", "How many processes hold a session: 1, or 2 where there are others, so that it outlives its router; 0 means 2."),
    Option("message-durability", T.CHOICE, "database", "When a message is acknowledged: database, when it is stored; memory, when two nodes have it; none, when it is dealt with.", choices=("none", "memory", "database")),
    Option("pending-limit", T.BYTES, "256M", "Bytes of messages that may wait in a router while the database is away; beyond it, clients are not read. (While it answers: 16M.) Stops a database that is away from filling memory."),
    Option("resume-timeout", T.SECONDS, "300s", "How long a session waits for its client (XEP-0198); 0: it ends with its connection.", per_host=True),
    Option("archive", T.BOOL, "true", "Whether messages are archived for accounts that have not said (XEP-0313, XEP-0441).", per_host=True),
    Option("archive-days", T.COUNT, "0", "For how many days archives keep messages; 0: for ever.", per_host=True),
    Option("max-archive-page", T.COUNT, "50", "Messages in one page of an archive. Stops one query from reading it all.", per_host=True),
    Option("c2s-location", T.TEXT, "", "Where clients of this node should come back to when their connection breaks, if not anywhere.", example="c1.example.org:5222"),
    Option("drain-timeout", T.SECONDS, "30s", "How long a stopping node may take to hand over."),
    # --- the process ---
    Option("processes", T.TEXT, "1", "How many processes to run: 1 for all services, more for routers and connectors apart; auto: one for each core.", example="auto"),
    Option("event-loop", T.CHOICE, "auto", "uvloop where it is installed, or asyncio.", choices=("auto", "uvloop", "asyncio")),
    # --- logs ---
    Option("log-format", T.CHOICE, "auto", "console, json, or by where output goes.", choices=("auto", "console", "json")),
    Option("debug", T.LIST, "", "Categories to log in detail: server, cluster, connector, router, registry, pubsub, component, database, or all."),
    # --- limits: each names what it stops; 0 switches it off ---
    Option("max-stanza-bytes", T.BYTES, "256k", "Bytes of one stanza. Stops one client from filling memory."),
    Option("max-stanza-depth", T.COUNT, "128", "Elements within elements. Stops trees that exhaust a walker's stack."),
    Option("max-stanza-attributes", T.COUNT, "64", "Attributes of one element. Stops tags that are nothing but work."),
    Option("max-streams-per-address", T.COUNT, "1000", "Streams of one address, loopback not counted. Stops one host from taking all."),
    Option("max-bytes-before-auth", T.BYTES, "64k", "Bytes before authentication. Stops strangers from keeping a parser busy."),
    Option("auth-timeout", T.SECONDS, "60s", "Time before authentication. Stops connections that are held for nothing."),
    Option("max-stanzas-per-second", T.COUNT, "2000", "Stanzas of one client a second; beyond it the socket is read later. Stops floods."),
    Option("max-bytes-per-second", T.BYTES, "4M", "Bytes of one client a second; beyond it the socket is read later. Stops floods."),
    Option("max-send-queue-bytes", T.BYTES, "8M", "Bytes that wait for one client. Stops clients that never read from filling memory."),
    Option("max-roster-items", T.COUNT, "2000", "Contacts in one roster. Stops rosters from becoming storage.", per_host=True),
    Option("max-offline-messages", T.COUNT, "1000", "Messages that wait for one account. Stops floods towards those who are away.", per_host=True),
)  # fmt: skip
