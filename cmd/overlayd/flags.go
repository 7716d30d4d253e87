package main

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"go.uber.org/zap"
	"go.uber.org/zap/buffer"
	"go.uber.org/zap/zapcore"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/agent"
	"github.com/overlayd/overlayd/diag/doctor"
	"github.com/overlayd/overlayd/diag/status"
	"github.com/overlayd/overlayd/masquerade"
	"github.com/overlayd/overlayd/subnet"
	"github.com/overlayd/overlayd/subnet/etcd"
)

const (
	defaultStateDir   = "/var/lib/overlayd"
	defaultSubnetFile = "/run/overlayd/subnet.env"
	defaultSocket     = "/run/overlayd/overlayd.sock"
	machineIDFile     = "/etc/machine-id"
)

// flags is everything that an operator can set.
type flags struct {
	store doctor.Store
	given []string                      // on the command line, by name
	owned map[status.StoreKind][]string // given flags, also by the environment, that belong to one store

	file    envFile  // of commands; the daemon has its environment
	unknown []string // variables of the environment that are named like settings

	agent            agent.Options
	firewall         masquerade.Options
	takeOver         string // an installation whose node this one may take
	sysctlDir        string
	wireGuardProgram string
	healthIP         string
	health           uint16 // its port; 0: off
	pprof            uint16 // 0: off
	socket           string
	logLevel         zap.AtomicLevel
	logFormat        string
	log              *zap.Logger
}

func (f *flags) addNode(s *pflag.FlagSet) {
	o := &f.agent
	s.StringVar(&o.Identity.NodeName, "node-name", "",
		"Unique `name` of this node (default: the host name, or $NODE_NAME if that is set and the store is kubernetes)")
	s.StringVar(&o.Identity.NodeID, "node-id", "",
		"Unique, permanent `ID` of this machine (default: from "+machineIDFile+")")
	s.StringVar(&o.SubnetFile, "subnet-file", defaultSubnetFile, "Subnet `file` to write for CNI plugins")
	s.StringVar(&o.StateDir, "state-dir", defaultStateDir,
		"State `directory`: the node's last subnet and peers")
	s.StringVar(&f.socket, "socket", defaultSocket, "Unix `socket` for overlayd's commands on this node; empty: none")
}

func (f *flags) addDaemon(s *pflag.FlagSet) {
	s.Var(parse("", func(path string) (err error) {
		if f.store.Etcd.InitConfig = nil; path == "" {
			return nil
		}
		if f.store.Etcd.InitConfig, err = os.ReadFile(path); err != nil {
			return err
		}
		if _, err := subnet.ParseConfig(f.store.Etcd.InitConfig); err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
		return nil
	}), "init-config", "JSON `file` to write to etcd as the network config if there is none")
	s.Var(duration(&f.store.Etcd.LeaseTTL, etcd.DefaultLeaseTTL, time.Second), "lease-ttl",
		"Time until a lease expires once its node stops renewing it")
	ownedBy(s, status.Etcd, "init-config", "lease-ttl")
	s.StringVar(&f.agent.Owner, "owner", "",
		"Installation that runs this daemon, such as `NAMESPACE/NAME`; refuse nodes of others for a day after they ran")
	s.StringVar(&f.takeOver, "take-over", "", "`Owner` of another installation whose nodes this one takes over")
	s.StringVar(&f.agent.CNIConf, "cni-conf", "",
		"CNI configuration `file` of overlayd in the container runtime's directory; report others that come before it")
	f.addInterface(s, &f.agent.Interface)
	f.addPackets(s, &f.agent)
	s.Var(duration(&f.agent.StalePeerGrace, 10*time.Minute, 0), "stale-peer-grace",
		"Time to keep peers whose leases are missing after the store lost data")
	s.BoolVar(&f.agent.MeshProbe, "mesh-probe", true, "Ping the peers in turn, at most ten packets per second")
	s.StringVar(&f.healthIP, "healthz-ip", "127.0.0.1",
		"Listen `address` of the HTTP server: /healthz, /readyz, /metrics, /status, /peers and the page at /")
	s.Var(parse("8471", port(&f.health)), "healthz-port", "Listen `port` of the HTTP server; 0: off")
	s.Var(parse("0", port(&f.pprof)), "pprof", "Loopback `port` for Go profiles of the daemon; 0: off")
	f.logLevel = zap.NewAtomicLevel()
	s.Var(parse("info", func(text string) error {
		if f.logLevel.UnmarshalText([]byte(text)) != nil {
			return expected("debug, info, warn or error", text)
		}
		return nil
	}), "log-level", "Minimum log `level`: debug, info, warn or error")
	s.Var(parse("console", func(text string) error {
		if f.logFormat = text; text != "console" && text != "json" {
			return expected("console or json", text)
		}
		return nil
	}), "log-format", "Log `format`: console or json")
}

func (f *flags) addInterface(s *pflag.FlagSet, o *agent.InterfaceOptions) {
	s.StringSliceVar(&o.Names, "iface", nil,
		"External `interface` or its address; the first match wins (default: the interface of the default route)")
	o.Regexes = nil
	s.Var(parse("", func(text string) error {
		re, err := regexp.Compile(text)
		if err != nil {
			return fmt.Errorf("%w: %w", expected("a regular expression", text), err)
		}
		o.Regexes = append(o.Regexes, re)
		return nil
	}), "iface-regex", "Regular `expression` for the name or address of the interface, if no --iface matches; repeatable")
	s.Var(parse("", address(&o.CanReach, "IP", addr.IPv4, addr.IPv6)), "iface-can-reach",
		"Use the interface of the route to this `address`, if no --iface or --iface-regex matches")
	s.Var(parse("", address(&o.PublicIP.V4, "IPv4", addr.IPv4)), "public-ip",
		"IPv4 `address` at which peers reach this node: its own, or that of a NAT gateway (default: the interface's)")
	s.Var(parse("", address(&o.PublicIP.V6, "IPv6", addr.IPv6)), "public-ipv6",
		"IPv6 `address` at which peers reach this node: its own, or that of a NAT gateway (default: the interface's)")
}

func (f *flags) addPackets(s *pflag.FlagSet, o *agent.Options) {
	s.BoolVar(&o.IPMasq, "ip-masq", true, "Masquerade traffic that leaves the pod network")
	o.MasqExclude = nil
	s.Var(parse("", func(text string) error {
		for _, part := range strings.FieldsFunc(text, func(r rune) bool { return r == ',' }) {
			p, err := netip.ParsePrefix(part)
			if err != nil {
				return expected("a network such as 192.0.2.0/24", part)
			}
			o.MasqExclude = append(o.MasqExclude, p.Masked())
		}
		return nil
	}), "ip-masq-exclude", "Destination `network` (CIDR) to exclude from masquerading; repeatable")
	s.BoolVar(&o.ForwardRules, "iptables-forward-rules", true, "Accept traffic of the pod network in the FORWARD chain")
	s.BoolVar(&o.IPForward, "ip-forward", true, "Enable IP forwarding for the families in use")
	s.BoolVar(&o.BridgeNetfilter, "bridge-netfilter", false,
		"Enable net.bridge.bridge-nf-call-iptables and -ip6tables, which kube-proxy needs; the host must load br_netfilter")
	s.StringVar(&f.sysctlDir, "sysctl-dir", "/proc/sys",
		"Write sysctls below this `directory`; in a container, a mount of the host's")
	s.StringVar(&f.wireGuardProgram, "wireguard-program", "",
		"Where the kernel has no WireGuard, start this `program` (wireguard-go) with the name of the device")
	s.Var(duration(&o.IPTablesResync, 10*time.Second, time.Second), "iptables-resync",
		"Resync interval of firewall rules for which the kernel sends no notifications; a plain number is in seconds")
	s.Var(parse(string(masquerade.KindAuto), func(text string) (err error) {
		f.firewall.Kind, err = masquerade.ParseKind(text)
		return err
	}), "firewall", "Firewall `driver`: auto (what the host and kube-proxy use), iptables or nftables")
	s.Var(parse("", func(text string) (err error) {
		f.firewall.Variant, err = masquerade.ParseVariant(text)
		return err
	}), "iptables-variant", "iptables `variant`: nft or legacy (default: what the host uses)")
}

// parsed is a flag whose text a function reads.
type parsed struct {
	text, kind string
	read       func(string) error
}

// parse returns a flag with a default, which it reads at once. An empty one leaves the zero value.
func parse(text string, read func(string) error) *parsed {
	if text != "" {
		_ = read(text)
	}
	return &parsed{text, "string", read}
}

func (p *parsed) String() string { return p.text }
func (p *parsed) Type() string   { return p.kind }

func (p *parsed) Set(text string) error {
	p.text = text
	return p.read(text)
}

// duration is a flag for a duration, which may also be given as flannel's plain number.
func duration(into *time.Duration, deflt, least time.Duration) *parsed {
	p := parse(deflt.String(), func(text string) error {
		d, err := time.ParseDuration(text)
		if n, errNumber := strconv.Atoi(text); errNumber == nil {
			d, err = time.Duration(n)*time.Second, nil
		}
		if err != nil || d < least {
			return expected(fmt.Sprintf("a duration such as 10s, at least %v", least), text)
		}
		*into = d
		return nil
	})
	p.kind = "duration"
	return p
}

// address reads the address of a node; nothing is none.
func address(into *netip.Addr, kind string, families ...addr.Family) func(string) error {
	return func(text string) error {
		a, ok := addr.ParseHost(text, families...)
		if text != "" && !ok {
			return expected("an "+kind+" address", text)
		}
		*into = a
		return nil
	}
}

func port(into *uint16) func(string) error {
	return func(text string) error {
		n, err := strconv.ParseUint(text, 10, 16)
		if err != nil {
			return expected("0 to 65535", text)
		}
		*into = uint16(n)
		return nil
	}
}

func expected(what, found string) error { return fmt.Errorf("expected %s, found %q", what, found) }

// wrongFlag names the flag in one way.
func wrongFlag(_ *cobra.Command, err error) error {
	if bad := (*pflag.InvalidValueError)(nil); errors.As(err, &bad) {
		err = fmt.Errorf("--%s: %w", bad.GetFlag().Name, errors.Unwrap(bad))
	}
	return usageError{err}
}

// envName is the variable that sets a flag: OVERLAYD_ETCD_ENDPOINTS for --etcd-endpoints.
func envName(flag string) string {
	return "OVERLAYD_" + strings.ToUpper(strings.ReplaceAll(flag, "-", "_"))
}

// fromEnvironment sets from the environment what the command line does not.
func fromEnvironment(s *pflag.FlagSet, lookup func(string) (string, bool)) error {
	var errs []error
	s.VisitAll(func(f *pflag.Flag) {
		v, ok := lookup(envName(f.Name))
		if !ok || f.Changed || f.Name == "help" || f.Name == "version" {
			return
		}
		if err := s.Set(f.Name, v); err != nil {
			err = fmt.Errorf("%s: %q is not valid for --%s: %w", envName(f.Name), v, f.Name, errors.Unwrap(err))
			errs = append(errs, err)
		}
	})
	if len(errs) > 0 {
		return usageError{errors.Join(errs...)}
	}
	return nil
}

// check reports what is wrong only where it is used: the files by some commands, the address if the port is not 0.
func (f *flags) check() error {
	var errs []error
	wrong := func(flag, what, found string) {
		errs = append(errs, fmt.Errorf("--%s: %w", flag, expected(what, found)))
	}
	if f.agent.SubnetFile == "" {
		wrong("subnet-file", "a value", "")
	}
	if f.agent.StateDir == "" {
		wrong("state-dir", "a value", "")
	}
	if _, err := netip.ParseAddr(f.healthIP); err != nil && f.health != 0 {
		wrong("healthz-ip", "an IP address", f.healthIP)
	}
	if len(errs) > 0 {
		return usageError{errors.Join(errs...)}
	}
	return nil
}

// identity is who this node is.
func (f flags) identity() (subnet.Identity, error) {
	id := f.agent.Identity
	inKubernetes := f.store.Kind == status.Kubernetes
	if id.NodeName == "" && inKubernetes {
		id.NodeName = os.Getenv("NODE_NAME")
	}
	if id.NodeName == "" {
		name, err := os.Hostname()
		if inKubernetes {
			name = strings.ToLower(name) // as the kubelet does
		}
		if err != nil || name == "" {
			return id, usageError{errors.New("--node-name: this machine has no host name, set one")}
		}
		id.NodeName = name
	}
	if id.NodeID == "" {
		raw, err := os.ReadFile(machineIDFile)
		id.NodeID = strings.TrimSpace(string(raw))
		if err != nil || id.NodeID == "" || id.NodeID == "uninitialized" {
			return id, usageError{fmt.Errorf("--node-id: %s has none, set one that is unique and permanent", machineIDFile)}
		}
	}
	if err := id.Check(); err != nil {
		return id, usageError{fmt.Errorf("--node-name, --node-id: %w", err)}
	}
	return id, nil
}

// listenHealth opens the address of the health checks; nil where they are turned off.
func (f *flags) listenHealth() (net.Listener, error) {
	if f.health == 0 {
		return nil, nil
	}
	l, err := net.Listen("tcp", net.JoinHostPort(f.healthIP, strconv.Itoa(int(f.health))))
	if err != nil {
		return nil, fmt.Errorf("--healthz-ip, --healthz-port: %w", err)
	}
	return l, nil
}

func (f *flags) logger() (*zap.Logger, error) {
	c := zap.NewProductionConfig()
	c.Level, c.Encoding = f.logLevel, f.logFormat
	c.Sampling, c.DisableCaller, c.DisableStacktrace = nil, true, true
	c.EncoderConfig.EncodeTime = zapcore.ISO8601TimeEncoder
	c.EncoderConfig.EncodeDuration = zapcore.StringDurationEncoder
	if !toJournal() {
		return c.Build()
	}
	encoder := zapcore.NewJSONEncoder
	if f.logFormat == "console" {
		encoder = zapcore.NewConsoleEncoder
		c.EncoderConfig.TimeKey = zapcore.OmitKey
	}
	lines := journalEncoder{encoder(c.EncoderConfig), buffer.NewPool()}
	return zap.New(zapcore.NewCore(lines, zapcore.Lock(os.Stderr), c.Level)), nil
}
