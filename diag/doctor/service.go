package doctor

import (
	"cmp"
	"fmt"
)

// Service is how the daemon is run here: as a pod of Kubernetes where both are given, else as systemd's
// overlayd.service.
type Service struct {
	Namespace, Pod string
}

func (s Service) inKubernetes() bool { return s.Namespace != "" && s.Pod != "" }

// restart is the command that restarts the daemon.
func (s Service) restart() string {
	if s.inKubernetes() {
		return fmt.Sprintf("kubectl -n %s delete pod %s", s.Namespace, s.Pod) // its DaemonSet makes another one
	}
	return "systemctl restart overlayd"
}

// start is the command that starts it. A pod that is there and without its daemon has to be recreated.
func (s Service) start() string {
	if s.inKubernetes() {
		return s.restart()
	}
	return "systemctl start overlayd"
}

// log shows the end of its log.
func (s Service) log() string {
	if s.inKubernetes() {
		return s.wholeLog() + " --tail 50"
	}
	return s.wholeLog() + " -n 50"
}

func (s Service) wholeLog() string {
	if s.inKubernetes() {
		return fmt.Sprintf("kubectl -n %s logs %s -c overlayd", s.Namespace, s.Pod)
	}
	return "journalctl -u overlayd"
}

// set gives it a setting, and restarts it. In Kubernetes that is for all nodes.
func (s Service) set(file, variable, value string) string {
	if s.inKubernetes() {
		return fmt.Sprintf("kubectl -n %s set env daemonset/overlayd %s=%s   # for all nodes, until the next apply: "+
			"put it into overlayd.env, or into the chart's values", s.Namespace, variable, value)
	}
	return fmt.Sprintf("echo %s=%s >> %s && %s", variable, value, cmp.Or(file, "/etc/overlayd/overlayd.env"), s.restart())
}

// other restarts the daemon on another machine, on which a shell is open.
func (s Service) other() string {
	if s.inKubernetes() {
		return "crictl stopp $(crictl pods --name overlayd --namespace " + s.Namespace + " -q)"
	}
	return s.restart()
}

// newID gives the machine on which it is run another ID.
func (s Service) newID() string {
	return "rm /etc/machine-id && systemd-machine-id-setup && " + s.other()
}

// newIdentity gives a machine that is a copy of another one a name and an ID of its own. Kubernetes has its own name
// for it.
func (s Service) newIdentity() string {
	if s.inKubernetes() {
		return s.newID()
	}
	return "hostnamectl set-hostname NEW-NAME && " + s.newID()
}
